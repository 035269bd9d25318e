"""Reports as HTML pages, and their pictures; one file per section of a page."""
