"""How messages travel between the server loop and the sites; an engine sees only bytes."""
