"""A search for good settings of a run: many short runs, each under the guard, judged by one measure."""
