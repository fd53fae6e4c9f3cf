"""The certificate that one result comes out under every layout, and the machinery by which it and the tests show it."""
