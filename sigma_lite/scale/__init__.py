"""From one device to many, and what that will cost. Nothing here needs torch until it trains."""
