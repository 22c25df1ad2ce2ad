package connect

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Text prints a snapshot for people and for goldens: a line for each field that is not zero,
// and for each certificate only whose it is. It leaves out the notices, and quotes what came
// from outside.
func (s *Snapshot) Text() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s.Leaves)) {
		fmt.Fprintf(&b, "Leaf %s: %s\n", quote(string(name)), s.Leaves[name].ID)
	}
	for _, name := range slices.Sorted(maps.Keys(s.Bundles)) {
		fmt.Fprintf(&b, "Bundle %s: %d roots of %s\n", quote(string(name)), s.Bundles[name].Count, s.Bundles[name].TrustDomain)
	}
	shown := *s
	shown.Leaves, shown.Bundles, shown.Notices = nil, nil, nil
	write(&b, "", reflect.ValueOf(shown))
	return b.String()
}

// write prints the exported fields of a struct that are not zero.
func write(b *strings.Builder, indent string, v reflect.Value) {
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.IsExported() && !v.Field(i).IsZero() {
			field(b, indent, f.Name, v.Field(i))
		}
	}
}

func field(b *strings.Builder, indent, name string, v reflect.Value) {
	for v.Kind() == reflect.Pointer && !v.IsNil() {
		if p, is := v.Interface().(*intentions.Policy); is {
			v = reflect.ValueOf(p.Config())
			break
		}
		v = v.Elem()
	}
	switch value := v.Interface().(type) {
	case time.Duration:
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, value)
		return
	case certs.SPIFFEID:
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, quote(value.String()))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		fmt.Fprintf(b, "%s%s:\n", indent, name)
		write(b, indent+"  ", v)
	case reflect.Slice:
		for i := range v.Len() {
			field(b, indent, fmt.Sprintf("%s %d", name, i+1), v.Index(i))
		}
	case reflect.Map:
		fmt.Fprintf(b, "%s%s: %d\n", indent, name, v.Len())
	case reflect.String:
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, quote(v.String()))
	default:
		fmt.Fprintf(b, "%s%s: %v\n", indent, name, v.Interface())
	}
}
