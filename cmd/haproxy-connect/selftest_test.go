package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/cmd/haproxy-connect/internal/scripttest"
	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/haproxy/selftest"
)

func TestSelfTest(t *testing.T) {
	for name, path := range scripttest.Versions(t) {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			bin, err := process.Find(ctx, path)
			require.NoError(t, err)
			account, err := process.WorkerAccount("")
			require.NoError(t, err)
			dir := filepath.Join(scripttest.ShortDir(t), "run")
			require.NoError(t, process.PrepareDir(dir, account))
			f := bin.Version.Features()
			err = selftest.Run(ctx, dir, render.Options{User: account.User, Group: account.Group, LuaBool: f.LuaBool, SPOP: f.SPOP},
				func(d string) error { return process.OwnSocketDir(d, account) },
				func(ctx context.Context, file string) (func(), error) { return bin.Once(ctx, dir, file) })
			if err != nil {
				b, _ := os.ReadFile(filepath.Join(dir, render.MainFile))
				t.Logf("%s", b)
			}
			require.NoError(t, err)
		})
	}
}
