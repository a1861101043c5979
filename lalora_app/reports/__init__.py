"""HTML reports, tables and charts of finished runs.

In: finished runs. Out: one HTML page with its tables and charts; figures of an audit.
"""
