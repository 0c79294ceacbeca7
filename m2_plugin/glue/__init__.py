"""GLUE: the tasks, the sweep over them, and its report."""
