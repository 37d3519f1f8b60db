"""The full RIS covariance network and its training, watched through gradguard's public names."""
