"""`glmlora serve`: a model and its adapters behind OpenAI's endpoints, for many callers at once.

One thread owns the model (`engine.py`); requests and answers cross to it by queues. Needs the extra
`serve` (FastAPI, uvicorn, pydantic), and llguidance for `response_format`.
"""
