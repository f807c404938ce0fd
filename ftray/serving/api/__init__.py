"""Routes, requests and responses of the endpoint, in the words of OpenAI."""
