# docs.mk: the chapters as one page, and their pictures.
#
## make docs             the article as one page, docs/article.html
## make pictures         draws the diagrams and plots of the chapters anew

docs: .venv/docs
	@$(PYTHON) docs/page.py docs/article.html $(wildcard docs/[1-8]-*.md)
	@echo docs/article.html
pictures: .venv/docs
	@$(PYTHON) docs/pictures.py docs/pictures

.PHONY: docs pictures
