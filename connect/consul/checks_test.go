package consul

import (
	"testing"

	"github.com/hashicorp/consul/api"
	"github.com/stretchr/testify/require"
)

// The path is taken from the agent's part of the output, never from the application's.
func TestCheckedPath(t *testing.T) {
	for output, want := range map[string]string{
		`HTTP GET http://:21500/debug?x=1: 200 OK Output: hello`:                  "/debug",
		`HTTP POST http://10.0.0.1:21500: 500 Internal Server Error Output: `:     "/",
		`Get "http://:21500/debug": dial tcp :21500: connect: connection refused`: "/debug",
		`Get "http://:21501/debug": dial tcp :21501: connect: connection refused`: "",
		`hello http://:21500/evil`:             "",
		"HTTP GET http://:21500/a b: 200 OK":   "",
		`HTTP GET http://:21500/a%20b: 200 OK`: "",
		"":                                     "",
	} {
		require.Equal(t, want, checkedPath(&api.AgentCheck{ExposedPort: 21500, Output: output}), output)
	}
}
