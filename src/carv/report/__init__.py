"""One self-contained HTML page, or a summary as JSON, from the records of a pilot or a sweep; nothing is measured here.

findings = carv.report.findings.load([folder, ...])
carv.report.page.write(findings, "report.html")
carv.report.summary.summary(findings)
"""
