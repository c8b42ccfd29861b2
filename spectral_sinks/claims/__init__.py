"""Numbers that pages state, and where the tables have them: pages that check themselves."""
