import { render } from 'preact';
import { expect, test, vi } from 'vitest';

import { Observable, useValue } from '../src/shared/stores/observable';

test('a value that changes between the drawing and the effects of a component is drawn', async () => {
  const observable = new Observable('old');
  const Shown = () => <p>{useValue(observable)}</p>;
  const place = document.createElement('div');
  document.body.append(place);
  render(<Shown />, place);
  observable.set('new'); // before the effects have run
  await vi.waitFor(() => expect(place.textContent).toBe('new'));
  render(null, place);
});
