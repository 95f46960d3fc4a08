"""`python -m bench.report`: page, plot and README anew from the figures that are there."""

from bench import report

report.render()
