"""`m2-plugin train-report`: draw the curves of runs from the files of their loggers."""
