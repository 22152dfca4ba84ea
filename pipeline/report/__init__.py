"""The HTML report of a run: report.html, one self-contained page.

In: a run folder, finished, failed or still running. Out: report.html in that folder. No torch.
Open page.py first: it collects what the template page.html.jinja shows. folder.py reads the run
folder; headline.py, data_audit.py and plots.py prepare sections; text.py formats values.
"""
