"""Other frameworks' words for what distlib does. Thin and optional: nothing here is imported unless it is asked for."""
