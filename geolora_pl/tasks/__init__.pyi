# The tasks, once: __init__.py reads them here, and so do type checkers.
from geolora_pl.tasks.causal_lm import CausalLM as CausalLM
from geolora_pl.tasks.image import ImageClassification as ImageClassification
from geolora_pl.tasks.question_answering import QuestionAnswering as QuestionAnswering
from geolora_pl.tasks.seq2seq import Seq2SeqLM as Seq2SeqLM
from geolora_pl.tasks.tagging import TokenClassification as TokenClassification
from geolora_pl.tasks.text import TextClassification as TextClassification
from geolora_pl.tasks.text_to_image import TextToImage as TextToImage
