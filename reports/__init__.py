"""What people look at: tables, CSV, Markdown, plots and the page."""
