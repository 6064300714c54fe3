// A component of the shared package as a widget of JupyterLab.
import type { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import type { Message } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';
import { type ComponentChild, h, render } from 'preact';

import { keepFocus } from '../shared/focus';
import { ENGLISH, type Translation, TranslationContext } from '../shared/translation';

export class ComponentWidget extends Widget {
  constructor(
    private readonly _component: ComponentChild,
    private readonly _trans?: IRenderMime.TranslationBundle
  ) {
    super();
    this.addClass('llmc-Component');
    // Keys in a panel are none of the notebook around it.
    this.node.dataset.lmSuppressShortcuts = 'true';
  }

  protected onAfterAttach(message: Message): void {
    super.onAfterAttach(message);
    this._render();
    this._loseFocus = keepFocus(this.node);
  }

  protected onBeforeDetach(message: Message): void {
    this._loseFocus();
    render(null, this.node);
    super.onBeforeDetach(message);
  }

  private _render(): void {
    const trans = (this._trans as Translation | undefined) ?? ENGLISH;
    render(h(TranslationContext.Provider, { value: trans, children: this._component }), this.node);
  }

  private _loseFocus: () => void = () => undefined;
}
