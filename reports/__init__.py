"""How a verdict is shown: terminal, Markdown, HTML, JUnit. Computes nothing."""
