"""The project's pages, and the site made of them."""
