"""Is a compressed checkpoint what it says, and does it compute what was measured?"""
