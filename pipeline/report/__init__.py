"""The HTML report of a run: report.html, one self-contained page.

In: the folder of a finished, failed or running run. Out: report.html in that folder. No torch.
Open page.py first: it collects the values for the template page.html.jinja. folder.py reads the
run folder; headline.py, data_audit.py and plots.py build sections; text.py formats values.
"""
