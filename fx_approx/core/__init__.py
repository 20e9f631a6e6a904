"""Plain records: candidates, plans, the counts of a step, which layer of torch a module is."""
