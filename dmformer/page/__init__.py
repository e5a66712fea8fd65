"""Reports as pages that need no network: pictures in SVG, tables and images, in one HTML file."""
