export PATH := $(PATH):/usr/sbin
# With auto, go fetches the toolchain that go.mod asks for, with its security fixes, if the
# installed one is older; local is for machines where it cannot be fetched.
export GOTOOLCHAIN := $(shell GOTOOLCHAIN=auto go version >/dev/null 2>&1 && echo auto || echo local)
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.7.0
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)

.PHONY: help build deps demo tour check test lint unit race fuzz bench soak

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

build: ## bin/haproxy-connect
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.release=$(VERSION)" -o bin/haproxy-connect ./cmd/haproxy-connect

deps: ## what the tests need: HAProxy, redis, Consul, a browser
	testdata/deps/deps.sh

demo: deps build ## a real mesh on this machine, up until Ctrl-C (CHECK=1: walk the story and end)
	testdata/demo/demo.sh

# tour builds the images twice to check that both builds are the same, and follows the story of
# the compose mesh and the guide of the README.
tour: ## the compose mesh of docker/, built from this tree, and its story
	testdata/deps/docker.sh sh -c 'docker/image.sh && docker compose -f docker/compose.yaml build -q && docker/tour.sh && testdata/guide/run.sh'

# gofmt and vet find mistakes of form, staticcheck mistakes of sense, and vuln.sh known
# vulnerabilities in what the program calls. There are no more checks, so that a finding is
# always worth reading. ST1005 is off: Consul's own messages, which users search for, begin
# with a capital.
lint: ## gofmt, vet, staticcheck, known vulnerabilities
	@test -z "$$(gofmt -l cmd certs connect haproxy intentions lua | tee /dev/stderr)"
	go vet ./...
	go run $(STATICCHECK) -checks inherit,-ST1005 ./...
	testdata/deps/vuln.sh

test: deps build lint race fuzz ## everything that CI checks
	CHECK=1 testdata/demo/demo.sh
	$(MAKE) tour

race: ## every test with the race detector
	go test -race -count=1 -timeout 60m -parallel 5 ./...

# What to run before each commit: under a minute.
check: unit ## format, vet and unit tests: under a minute
	@test -z "$$(gofmt -l cmd certs connect haproxy intentions lua | tee /dev/stderr)"
	go vet ./...

unit: ## what needs neither Consul nor HAProxy: seconds
	go test -short ./...

# Each target gets as many inputs as take some 20 s, and not a limit of 20 s: Go itself now and
# then reports a time that ends as a failure (context deadline exceeded). Without a limit on
# minimizing, Go may spend all inputs on making one smaller.
fuzz = -fuzztime $(or $(FUZZTIME),$(1)) -fuzzminimizetime 1s

fuzz: ## the fuzz targets (FUZZTIME=10m)
	go test ./certs -run '^$$' -fuzz FuzzParseID $(call fuzz,700000x)
	go test ./intentions/spoe -run '^$$' -fuzz FuzzFrame $(call fuzz,350000x)
	go test ./intentions/jwt -run '^$$' -fuzz FuzzToken $(call fuzz,450000x)
	go test ./haproxy/render -run '^$$' -fuzz FuzzNothingAddsALine $(call fuzz,5000x)
	go test ./haproxy/render -run '^$$' -fuzz FuzzPattern $(call fuzz,150000x)
	go test ./connect/consul -run '^$$' -fuzz FuzzChain $(call fuzz,150000x)
	go test ./haproxy/runtimeapi -run '^$$' -fuzz FuzzShow $(call fuzz,300000x)
	go test ./haproxy/render -run '^$$' -fuzz FuzzAccessFormat $(call fuzz,350000x)
	go test ./connect/consul -run '^$$' -fuzz FuzzRegistration $(call fuzz,400000x)
	go test ./connect/consul -run '^$$' -fuzz FuzzBytes $(call fuzz,60000x)

# bench prints figures and judges none. Its last line drives real Consul and HAProxy, and with
# UPDATE=-update writes the tables and plots of testdata/measure.
bench: ## the benchmarks beside peers (UPDATE=-update writes the tables)
	testdata/deps/deps.sh bench
	go test ./... -p 1 -run '^$$' -bench . -benchmem | grep -v 'no test files\|^PASS\|^ok'
	go test ./cmd/haproxy-connect -run TestMeasure -measure -parallel 1 -timeout 60m -v $(UPDATE) | grep measured

# Random changes and faults under load until SOAK is over or something breaks; SEED=n
# does it again.
SOAK ?= 10m
SEED ?= 0
soak: deps ## random changes and faults under load (SOAK=1h SEED=7)
	go test ./cmd/haproxy-connect -run TestSoak -soak $(SOAK) -seed $(SEED) -timeout 0 -v $(if $(HAPROXY_VERSION),-haproxy-version $(HAPROXY_VERSION))
