"""Compare runs in one HTML file: `bnjax report RUN...`."""

from bnjax.report.page import check_layers as check_layers
from bnjax.report.page import make_report as make_report
from bnjax.report.runs import RunReport as RunReport
from bnjax.report.runs import read_runs as read_runs
