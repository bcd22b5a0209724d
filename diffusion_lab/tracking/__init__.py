"""Pictures, reports and dashboards of runs."""
