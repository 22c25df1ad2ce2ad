# make demo   a real mesh on this machine, up until Ctrl-C (CHECK=1: walk the story and end)
# make tour   the compose mesh of docker/, built from this tree, and its story
# make test   everything CI checks
# make build  bin/haproxy-connect
export PATH := $(PATH):/usr/sbin
# A Go with the security fixes that go.mod asks for, where the installed one lacks them.
export GOTOOLCHAIN = auto
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.7.0
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)

.PHONY: build deps demo tour test lint unit race fuzz bench soak

build:
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.release=$(VERSION)" -o bin/haproxy-connect ./cmd/haproxy-connect

deps:
	testdata/deps/deps.sh

demo: deps build
	testdata/demo/demo.sh

# The images, built twice to see that they are the same; the compose mesh and its story.
tour:
	testdata/deps/docker.sh sh -c 'docker/image.sh && docker compose -f docker/compose.yaml build -q && docker/tour.sh && testdata/guide/run.sh'

# gofmt and vet find mistakes of form, staticcheck mistakes of sense; no more, so
# that a finding is always worth reading. ST1005 is off: Consul's own messages, which
# users search for, begin with a capital. Last, known vulnerabilities of what is called.
lint:
	@test -z "$$(gofmt -l cmd certs connect haproxy intentions lua | tee /dev/stderr)"
	go vet ./...
	go run $(STATICCHECK) -checks inherit,-ST1005 ./...
	testdata/deps/vuln.sh

test: deps build lint race fuzz
	CHECK=1 testdata/demo/demo.sh
	$(MAKE) tour

race:
	go test -race -count=1 -timeout 60m -parallel 3 ./...

# The same without scripts: seconds.
unit:
	go test -short ./...

# So many inputs as take some 20 s, and not 20 s: a time that ends is now and then
# reported as a failure (context deadline exceeded) by Go itself. Without a limit Go may
# spend all of them on making one input smaller.
fuzz = -fuzztime $(or $(FUZZTIME),$(1)) -fuzzminimizetime 1s

fuzz:
	go test ./certs -run '^$$' -fuzz FuzzParseID $(call fuzz,700000x)
	go test ./intentions/spoe -run '^$$' -fuzz FuzzFrame $(call fuzz,350000x)
	go test ./intentions/jwt -run '^$$' -fuzz FuzzToken $(call fuzz,450000x)
	go test ./haproxy/render -run '^$$' -fuzz FuzzNothingAddsALine $(call fuzz,120000x)
	go test ./haproxy/runtimeapi -run '^$$' -fuzz FuzzShow $(call fuzz,300000x)
	go test ./haproxy/render -run '^$$' -fuzz FuzzAccessFormat $(call fuzz,350000x)
	go test ./connect/consul -run '^$$' -fuzz FuzzRegistration $(call fuzz,400000x)

# Prints; judges nothing. The second line drives real Consul and HAProxy, and writes the
# tables and plots of the README with UPDATE=-update.
bench:
	testdata/deps/deps.sh bench
	go test ./... -p 1 -run '^$$' -bench . -benchmem | grep -v 'no test files\|^PASS\|^ok'
	go test ./cmd/haproxy-connect -run TestMeasure -measure -parallel 1 -timeout 60m -v $(UPDATE) | grep measured

# Random changes and faults under load until SOAK is over or something breaks; SEED=n
# does it again.
SOAK ?= 10m
SEED ?= 0
soak: deps
	go test ./cmd/haproxy-connect -run TestSoak -soak $(SOAK) -seed $(SEED) -timeout 0 -v $(if $(HAPROXY_VERSION),-haproxy-version $(HAPROXY_VERSION))
