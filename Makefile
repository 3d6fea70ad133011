# make demo                  simulated ECGs -> arrays -> a short training -> the report, nothing to download but packages
# make test                  the tests
# make reproduce PTBXL=DIR   the paper's run, on PTB-XL as PhysioNet lays it out: all normals of folds 1-9; scores of the epoch
#                            that is best on the test set, as published, and of the last one, which nothing chose. Made again
#                            after a stop, it goes on. The epoch is chosen by one beat a record; VAL_BEATS=0: by all, as published.
#                            Fold 9 is not scored: the network was trained on it. Remove ckpt/reproduce before another run
#
# Each target makes .venv from requirements.txt first. DATA, OUT, RATE (the files' 100 or 500 Hz) and LUDB, its folder, may be set.

PYTHON ?= python3
RUN := .venv/bin/python
DATA ?= data
OUT ?= results
RATE ?= 500
VAL_BEATS ?= 1

.PHONY: demo test reproduce

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

demo: .venv/installed
	$(RUN) -m tools.synthetic --out demo/ptb-xl --records 300
	$(RUN) preprocess.py --ptbxl_path demo/ptb-xl --data_path demo/data \
		--benchmark_truth demo/ptb-xl/localization_truth.npz
	$(RUN) train.py --data_path demo/data --save_path demo/ckpt/model.pt --protocol clean --epochs 8 --batch_size 8 \
		--lr 1e-3 --select last --reference 0
	$(RUN) test.py --data_path demo/data --load_path demo/ckpt/model.pt --output_dir demo/results
	@$(RUN) -c 'import json; found = json.load(open("demo/results/results.json")); \
		good = all(found[name]["detection_auroc"] > 0.9 and found[name]["localization_auroc_pooled"] > 0.8 \
		and found[name]["localization_auroc_per_record"] > 0.8 for name in ("paper", "clean")); \
		print("demo: detection above 90 and localization above 80, as they must be" if good else \
		"demo: an AUROC is too low on data this easy, something is wrong"); raise SystemExit(not good)'

# in two processes, one a core; the first one's output follows the second's
test: .venv/installed
	@$(RUN) -m pytest tests/test_[a-m]*.py -q > .venv/tests.log 2>&1 & first=$$!; trap "kill $$first" INT TERM; \
		$(RUN) -m pytest tests/test_[n-z]*.py -q; second=$$?; \
		wait $$first; first=$$?; cat .venv/tests.log; exit $$((first | second))

reproduce: .venv/installed
	@test -n "$(PTBXL)" || { echo "error: name the PTB-XL folder: make reproduce PTBXL=DIR" >&2; exit 2; }
	$(RUN) preprocess.py --ptbxl_path "$(PTBXL)" --data_path $(DATA) --sampling_rate $(RATE) \
		$(if $(LUDB),--ludb_path "$(LUDB)")
	$(RUN) train.py --data_path $(DATA) --protocol paper --select test --val_beats $(VAL_BEATS) --epochs 50 --reference 0 \
		--save_path ckpt/reproduce/model.pt $(if $(wildcard ckpt/reproduce/last.pt),--resume)
	$(RUN) test.py --data_path $(DATA) --load_path ckpt/reproduce/model.pt --protocol paper --fold9 0 \
		--output_dir $(OUT)/best
	$(RUN) test.py --data_path $(DATA) --load_path ckpt/reproduce/last.pt --protocol paper --fold9 0 \
		--output_dir $(OUT)/last
