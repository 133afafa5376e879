"""The verbs: each file turns descriptions into a Plan and holds the kind of Unit that the plan is made of."""
