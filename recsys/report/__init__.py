"""What all reports are laid out with: a page of HTML, its style by day and night, and plots as inline SVG."""
