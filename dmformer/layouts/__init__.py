"""What a server serves: model repositories, and a page for browsers."""
