"""The one room that asks models questions: pictures, messages, sources, answers, joining."""
