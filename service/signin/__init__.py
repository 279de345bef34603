"""How a person proves who they are in a browser, and what the browser holds afterwards."""
