"""What all HTML reports share: page, style sheet, and plots as inline SVG."""
