"""A parallel corpus of our own: plain English sentences with correct Romanian, from a small grammar.

``lexicon`` holds the words with every form written out, ``phrases`` makes noun phrases that agree, ``clauses`` puts
verbs and pronouns in order, ``sentences`` has one function per kind of sentence, ``build`` draws and splits them.
"""
