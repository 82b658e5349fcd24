"""An HTTP server for a model, with a web page. Needs the extra `serve`."""
