"""The server: a page that draws as you type, and the image APIs that other programs speak.

request -> catalogue, orders -> Order -> queue -> worker (the thread of MLX) -> events -> answer
"""
