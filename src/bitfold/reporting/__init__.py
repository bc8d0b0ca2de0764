"""Reports: one HTML file for people, pictures for papers, from what the folders know about themselves."""

from __future__ import annotations

from bitfold.reporting.charts import plots
from bitfold.reporting.data import Measuring, ReportData, gather
from bitfold.reporting.page import write_report
from bitfold.reporting.pictures import save_plots

__all__ = ["Measuring", "ReportData", "gather", "plots", "save_plots", "write_report"]
