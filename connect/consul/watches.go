package consul

import (
	"context"
	"reflect"
	"time"
)

// watch is one question that is asked again and again. Watches are wanted by the state,
// never started by hand: see Source.sync.
type watch struct {
	key  string // the whole question: equal keys are one watch
	name string // for people
	// subject is what the question is about. Until it is answered, the answer to another
	// question about the same subject counts. "": no other answer counts.
	subject string
	every   time.Duration // between questions that cannot block; 0: a blocking query
	fetch   fetch
	same    func(a, b any) bool // nil: reflect.DeepEqual
	// void reports whether an answer is empty, and so held back for a while just after Consul
	// came back: see restartGrace. Nil: no answer is.
	void func(v any) bool
	// shapes reports whether an answer may change what else is asked. Nil: each may.
	shapes func(v any) bool
}

// fetch asks once. The answer is never nil, and never changes afterwards.
type fetch func(ctx context.Context, c *cursor) (any, error)

// answer is what a watch has heard last.
type answer struct {
	watch
	ctx    context.Context // of the watch
	cancel context.CancelFunc
	value  any // nil: nothing yet
	turn   uint64
	held   time.Time // late is held back until then; zero: nothing is
	late   any
}

// update is an answer on its way to the state.
type update struct {
	to    *answer
	value any // nil: what is held back is due
}

// state is what the mesh said last. Only Run's goroutine touches it.
type state struct {
	answers map[string]*answer // by the watch's key
	turn    uint64             // counts changes
	dirty   bool               // something has changed since the last snapshot
	shaped  bool               // something has changed that may change what is asked
	wake    time.Time          // when assemble wants to be called again; zero: with the next change
}

// heard is the answer to a question, and whether there is one.
func heard[T any](st *state, key string) (v T, ok bool) {
	if a := st.answers[key]; a != nil {
		v, ok = a.value.(T)
	}
	return v, ok
}

// turnOf returns a number that changes whenever the answer to a question does; 0: no answer yet.
func (st *state) turnOf(key string) uint64 {
	if a := st.answers[key]; a != nil {
		return a.turn
	}
	return 0
}

// wakeAt asks for another assembly at a time, if none comes sooner.
func (st *state) wakeAt(t time.Time) {
	if st.wake.IsZero() || t.Before(st.wake) {
		st.wake = t
	}
}

func (st *state) set(a *answer, v any) {
	a.held, a.late = time.Time{}, nil
	equal := a.same
	if equal == nil {
		equal = reflect.DeepEqual
	}
	if a.value != nil && equal(a.value, v) {
		return
	}
	st.turn++
	st.dirty = true
	st.shaped = st.shaped || a.shapes == nil || a.shapes(v) || a.value != nil && a.shapes(a.value)
	a.value, a.turn = v, st.turn
}

// sync starts every wanted watch that does not run yet, and repeats that while answers that new
// watches take over make further watches wanted. Only then it stops the watches that are not
// wanted any more: till then their answers can be taken over.
func (s *Source) sync(ctx context.Context, st *state, wants func() []watch) {
	var wanted map[string]bool
	for st.shaped = true; st.shaped; {
		st.shaped = false
		list := wants()
		wanted = make(map[string]bool, len(list))
		for i := range list {
			wanted[list[i].key] = true
			if st.answers[list[i].key] == nil {
				s.start(ctx, st, list[i])
			}
		}
	}
	for key, a := range st.answers {
		if !wanted[key] {
			a.cancel()
			delete(st.answers, key)
			st.dirty = true
		}
	}
}

// start begins a watch. It takes over the answer of another watch about the same subject.
func (s *Source) start(ctx context.Context, st *state, w watch) {
	a := &answer{watch: w}
	a.ctx, a.cancel = context.WithCancel(ctx)
	for _, old := range st.answers {
		if w.subject != "" && old.subject == w.subject && old.value != nil {
			st.set(a, old.value)
		}
	}
	st.answers[w.key] = a
	s.wg.Go(func() {
		f := s.feeds.open(w.name)
		defer s.feeds.drop(f)
		if w.every > 0 {
			s.poll(a, f)
		} else {
			s.follow(a, f)
		}
	})
}

func (s *Source) send(a *answer, v any) bool {
	select {
	case s.updates <- update{a, v}:
		return true
	case <-a.ctx.Done():
		return false
	}
}

// restartGrace is how long after trouble with Consul a target keeps its endpoints
// although all of them have gone at once. A restarted agent calls every check critical
// until it has run; a server that is elected before gossip has reached it deregisters
// the nodes it has not heard of (agent/consul, reconcileReaped), until their agents
// notice.
const restartGrace = 15 * time.Second

// take brings an answer into the state. Within restartGrace it holds back a void answer that
// would replace one that is not void; further void answers do not prolong that.
func (s *Source) take(st *state, u update) {
	a := u.to
	if st.answers[a.key] != a {
		return // it is not wanted any more
	}
	switch {
	case u.value == nil:
		if a.late != nil && !time.Now().Before(a.held) {
			st.set(a, a.late)
		}
	case a.void == nil || !a.void(u.value) || a.value == nil || a.void(a.value):
		st.set(a, u.value)
	case a.late != nil:
		a.late = u.value
	default:
		s.hold(st, a, u.value)
	}
}

func (s *Source) hold(st *state, a *answer, v any) {
	until := s.feeds.settled().Add(restartGrace)
	wait := time.Until(until)
	if wait <= 0 {
		st.set(a, v)
		return
	}
	a.held, a.late = until, v
	s.held.Add(1)
	s.log.Warn("all endpoints have gone just after Consul came back; the last ones stay for now", "watch", a.name, "for", wait.Round(time.Second),
		"try", "nothing, if they return; else: are the instances registered, and do their checks pass?")
	s.wg.Go(func() {
		if pause(a.ctx, wait) {
			s.send(a, nil)
		}
	})
}
