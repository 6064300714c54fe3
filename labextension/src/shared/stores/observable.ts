// A value that components follow.
import { useEffect, useRef, useState } from 'preact/hooks';

/** A value with listeners. `wake` is called when the first comes, `rest` when the last has gone. */
export class Observable<T> {
  constructor(private _value: T) {}

  get value(): T {
    return this._value;
  }

  set(value: T): void {
    if (value !== this._value) {
      this._value = value;
      this._listeners.forEach(listener => listener(value));
    }
  }

  /** Follow the value until the returned function is called; the present one is not told. */
  follow(listener: (value: T) => void): () => void {
    this._listeners.add(listener);
    if (this._listeners.size === 1) {
      this.wake();
    }
    return () => {
      if (this._listeners.delete(listener) && !this._listeners.size) {
        this.rest();
      }
    };
  }

  protected wake(): void {
    // nothing to begin
  }

  protected rest(): void {
    // nothing to end
  }

  private readonly _listeners = new Set<(value: T) => void>();
}

/** The present value of an observable, in a component. */
export function useValue<T>(observable: Observable<T>): T {
  const [, redraw] = useState(0);
  const drawn = useRef(observable.value);
  drawn.current = observable.value;
  useEffect(() => {
    const leave = observable.follow(() => redraw(count => count + 1));
    if (observable.value !== drawn.current) {
      redraw(count => count + 1); // it changed between the drawing and now
    }
    return leave;
  }, [observable]);
  return observable.value;
}
