package spoe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Frame types, flags and data types of SPOP 2.0 (HAProxy, doc/SPOE.txt, section 3.2).
const (
	frameHAProxyHello      = 1
	frameHAProxyDisconnect = 2
	frameNotify            = 3
	frameAgentHello        = 101
	frameAgentDisconnect   = 102
	frameAck               = 103

	flagFin   = 1
	flagAbort = 2

	typeNull   = 0
	typeBool   = 1
	typeInt32  = 2
	typeUint32 = 3
	typeInt64  = 4
	typeUint64 = 5
	typeIPv4   = 6
	typeIPv6   = 7
	typeString = 8
	typeBinary = 9

	boolTrue = 0x10
)

// maxFrame is the longest frame that the agent agrees to. HAProxy offers tune.bufsize - 4; the
// smaller of the two holds for both sides, and a longer frame is a protocol error.
const maxFrame = 128 << 10

// Status codes of a DISCONNECT frame.
const (
	statusNormal  = 0
	statusInvalid = 4
)

var errShort = errors.New("frame ends in the middle of a value")

// frame is one frame; payload is valid until the next read into the same buffer.
type frame struct {
	kind    byte
	flags   uint32
	stream  uint64
	id      uint64
	payload []byte
}

// readFrame reads into buf, whose length is that of the longest frame.
func readFrame(r io.Reader, buf []byte) (frame, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n < 5 || int64(n) > int64(len(buf)) {
		return frame{}, fmt.Errorf("frame of %d bytes: must be 5 to %d", n, len(buf))
	}
	b := buf[:n]
	if _, err := io.ReadFull(r, b); err != nil {
		return frame{}, err
	}
	return parseFrame(b)
}

func parseFrame(b []byte) (frame, error) {
	if len(b) < 5 {
		return frame{}, errShort
	}
	f := frame{kind: b[0], flags: binary.BigEndian.Uint32(b[1:5])}
	rest := b[5:]
	var ok bool
	if f.stream, rest, ok = varint(rest); !ok {
		return frame{}, errShort
	}
	if f.id, rest, ok = varint(rest); !ok {
		return frame{}, errShort
	}
	f.payload = rest
	return f, nil
}

// varint decodes HAProxy's own variable length integers: values below 240 take
// one byte; above, 4 bits of the first byte and 7 of each that follows.
func varint(b []byte) (uint64, []byte, bool) {
	if len(b) == 0 {
		return 0, nil, false
	}
	v := uint64(b[0])
	if v < 240 {
		return v, b[1:], true
	}
	for i, shift := 1, uint(4); i < len(b) && shift < 64; i, shift = i+1, shift+7 {
		v += uint64(b[i]) << shift
		if b[i] < 128 {
			return v, b[i+1:], true
		}
	}
	return 0, nil, false
}

func appendVarint(b []byte, v uint64) []byte {
	if v < 240 {
		return append(b, byte(v))
	}
	b = append(b, byte(v)|240)
	v = (v - 240) >> 4
	for v >= 128 {
		b = append(b, byte(v)|128)
		v = (v - 128) >> 7
	}
	return append(b, byte(v))
}

// text reads a length and that many bytes.
func text(b []byte) (s, rest []byte, ok bool) {
	n, rest, ok := varint(b)
	if !ok || n > uint64(len(rest)) {
		return nil, nil, false
	}
	return rest[:n], rest[n:], true
}

func appendText(b []byte, s string) []byte {
	return append(appendVarint(b, uint64(len(s))), s...)
}

// value is one typed datum. Text and binary alias the frame's buffer.
type value struct {
	kind  byte
	num   uint64
	bytes []byte
}

func typed(b []byte) (v value, rest []byte, ok bool) {
	if len(b) == 0 {
		return v, nil, false
	}
	v.kind = b[0] & 0x0f
	flags := b[0]
	rest = b[1:]
	switch v.kind {
	case typeNull:
		return v, rest, true
	case typeBool:
		if flags&boolTrue != 0 {
			v.num = 1
		}
		return v, rest, true
	case typeInt32, typeUint32, typeInt64, typeUint64:
		v.num, rest, ok = varint(rest)
		return v, rest, ok
	case typeIPv4, typeIPv6:
		n := 4
		if v.kind == typeIPv6 {
			n = 16
		}
		if len(rest) < n {
			return v, nil, false
		}
		v.bytes = rest[:n]
		return v, rest[n:], true
	case typeString, typeBinary:
		v.bytes, rest, ok = text(rest)
		return v, rest, ok
	}
	return v, nil, false
}

func appendString(b []byte, s string) []byte { return appendText(append(b, typeString), s) }

// beginFrame reserves the length; endFrame fills it in.
func beginFrame(b []byte, kind byte, stream, id uint64) []byte {
	b = append(b, 0, 0, 0, 0, kind, 0, 0, 0, flagFin)
	return appendVarint(appendVarint(b, stream), id)
}

func endFrame(b []byte, from int) []byte {
	binary.BigEndian.PutUint32(b[from:], uint32(len(b)-from-4))
	return b
}

// The scopes of a variable.
const (
	scopeSession     = 1
	scopeTransaction = 2
)

// appendSetVar appends the action that sets a variable of the session or transaction.
func appendSetVar(b []byte, scope byte, name, val string) []byte {
	b = append(b, 1, 3, scope)
	return appendString(appendText(b, name), val)
}

// eachPair walks n key-value pairs of a message, or, if n is negative, all of a HELLO or
// DISCONNECT frame.
func eachPair(b []byte, n int, do func(key []byte, v value)) (rest []byte, err error) {
	for ; (n < 0 && len(b) > 0) || n > 0; n-- {
		key, rest, ok := text(b)
		if !ok {
			return nil, errShort
		}
		v, rest, ok := typed(rest)
		if !ok {
			return nil, errShort
		}
		do(key, v)
		b = rest
	}
	return b, nil
}
