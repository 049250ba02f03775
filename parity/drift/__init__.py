"""`parity drift`: golden dumps and the ledger of margins."""
