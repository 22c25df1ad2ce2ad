package certs

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteFile replaces a file in one step: readers see the old content or the new,
// never a part, and never with a wider mode than asked for. The parent must exist.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	return WriteTo(path, bytes.NewReader(data), mode)
}

// WriteTo is WriteFile for what is too large to be put together first.
func WriteTo(path string, from io.WriterTo, mode fs.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // gone already once renamed
	if err := tmp.Chmod(mode); err != nil {
		tmp.Close()
		return err
	}
	if _, err := from.WriteTo(tmp); err != nil {
		tmp.Close()
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := tmp.Close(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(tmp.Name(), path)
}
