"""HTML pages about runs, made without torch: report.html for one run, comparison.html for several.

Input: the folders of finished, failed or running runs. Output: pages that load no other files.
Open page.py first: it collects the values for the template page.html.jinja. folder.py reads the
run folder; headline.py, curves.py, timeline.py, data_audit.py, documents.py and reproduce.py build
sections; comparison.py writes the comparison; frame.py renders a page with its style, scripts and
content security policy; watch.py follows a run. charts.js draws the curves with uPlot (uplot/).
"""
