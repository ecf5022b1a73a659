"""The demo: a bundled guest and the policy that judges its requests."""
