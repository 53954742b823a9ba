"""Where families' data and networks come from: files, images, seeds, parameters. Imports the core."""
