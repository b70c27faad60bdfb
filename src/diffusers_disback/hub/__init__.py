"""Files, their names and texts, and the Hub. Publishing a run, which needs all of them, is `hub.publish`."""
